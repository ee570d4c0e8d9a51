"""How an edit is judged: where a dragged thing has gone, what else has changed, and how sure a mean is."""
