"""Views: drawn on the host as plans, rendered by interchangeable renderers, delivered by a loader."""

from orl_fast.views.loader import ViewLoader, Views
from orl_fast.views.plan import ViewPlan, draw_byol, draw_orl

__all__ = ["ViewLoader", "ViewPlan", "Views", "draw_byol", "draw_orl"]
