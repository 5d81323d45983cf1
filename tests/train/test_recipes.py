"""The shipped recipes: coco-r50 is the paper's table, tiny is small."""

from orl_fast.config import Config, load_config
from orl_fast.train.optim import base_learning_rate


def test_coco_r50_is_the_papers_table() -> None:
    config = load_config("coco-r50")
    assert config == Config()  # the defaults are the paper's too
    assert base_learning_rate(config) == 0.4
    model, optim, train, views = config.model, config.optim, config.train, config.views
    assert (model.backbone, model.projector_hidden, model.projector_out, model.predictor_hidden) == ("resnet50", 4096, 256, 4096)
    assert (optim.lr_per_256, optim.momentum, optim.weight_decay, optim.warmup_epochs) == (0.2, 0.9, 1e-4, 4)
    assert (optim.cosine, optim.ema_momentum) == ("epoch", 0.99)
    assert (train.batch_size, train.epochs, train.sync_bn, train.joined_views) == (512, 800, True, False)
    assert (config.orl.image_weight, config.orl.intra_weight, config.orl.inter_weight) == (1, 1, 1)
    assert (views.image_size_px, views.patch_size_px, views.crop_area, views.crop_aspect) == (224, 96, (0.08, 1), (3 / 4, 4 / 3))
    assert (views.flip_prob, views.jitter_prob, views.grayscale_prob) == (0.5, 0.8, 0.2)
    assert (views.brightness, views.contrast, views.saturation, views.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (views.blur_sigma_px, views.blur_prob, views.solarize_prob) == ((0.1, 2), (1, 0.1), (0, 0.2))
    assert (views.roi_shift, views.roi_area, views.roi_aspect, views.roi_min_iou, views.roi_attempts) == (0.5, (0.5, 2), (0.5, 2), 0.5, 200)
    mining = config.mining
    assert (mining.resize_px, mining.crop_px, mining.num_neighbors, mining.pair_ratio, mining.roi_size_px) == (256, 224, 10, 0.1, 224)
    assert (mining.min_side_px, mining.max_aspect, mining.max_iou, mining.max_rois) == (96, 3, 0.5, 100)


def test_tiny_works_on_a_hundred_photographs() -> None:
    config = load_config("tiny")
    assert config.train.batch_size <= 64
    assert config.optim.warmup_epochs < config.train.epochs
    assert config.views.image_size_px < 128
