"""Videos made from rows: what a row determines, which are complete, packs made together, and what came of them."""
