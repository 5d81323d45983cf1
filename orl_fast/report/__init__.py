"""Pictures of mined pairs and of views."""

from orl_fast.report.pictures import Cell, Grid, draw_grid, pair_grid, render_views, save_picture, view_grid

__all__ = ["Cell", "Grid", "draw_grid", "pair_grid", "render_views", "save_picture", "view_grid"]
