"""An operator, a cost model, a search and an explainer of one's own, as an installed package."""
