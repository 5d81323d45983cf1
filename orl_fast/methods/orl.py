"""ORL: Xie et al., "Unsupervised Object-Level Representation Learning from Scene Images", NeurIPS 2021; stage 3."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from orl_fast.config import Config
from orl_fast.methods.byol import symmetric_loss
from orl_fast.methods.method import Method, normalized
from orl_fast.models.heads import predictor
from orl_fast.models.momentum import Branch, frozen_copy, project, update_target
from orl_fast.views.loader import Views


class ORL(Method):
    """BYOL on three levels (section 3.3): two views of the image, an RoI and its jittered copy, an RoI and its partner elsewhere.

    One backbone and projector serve all levels, each level has its own predictor. A term whose weight is 0 is not computed.
    """

    needs_pairs = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        weights = {"image": config.orl.image_weight, "intra": config.orl.intra_weight, "inter": config.orl.inter_weight}
        self.weights = {term: weight for term, weight in weights.items() if weight > 0}
        self.online = Branch(config.model)
        self.target = frozen_copy(self.online)
        hidden, dim = config.model.predictor_hidden, config.model.projector_out
        self.predictors = nn.ModuleDict({term: predictor(dim, hidden=hidden) for term in self.weights})

    def loss(self, views: Views) -> dict[str, Tensor]:
        pairs = {"image": views.image, "intra": views.intra, "inter": views.inter}
        drawn = {term: [normalized(view) for view in pairs[term] or ()] for term in self.weights}
        online = self._project(self.online, drawn)
        with torch.no_grad():
            target = self._project(self.target, drawn)
        terms = {term: symmetric_loss(self.predictors[term], online[term], target[term]) for term in drawn}
        total = torch.stack([self.weights[term] * loss for term, loss in terms.items()]).sum()
        return {"loss": total} | {term: loss.detach() for term, loss in terms.items()}

    def after_step(self, *, momentum: float) -> None:
        update_target(self.target, self.online, momentum=momentum)

    def _project(self, branch: Branch, drawn: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Two projections for each term. Joined views make one pass over the images and one over all patches."""
        projected: dict[str, list[Tensor]] = {}
        for level in (("image",), ("intra", "inter")):
            terms = [term for term in level if term in drawn]
            outputs = project(branch, [view for term in terms for view in drawn[term]], joined=self.config.train.joined_views)
            projected |= {term: outputs[2 * i : 2 * i + 2] for i, term in enumerate(terms)}
        return projected
