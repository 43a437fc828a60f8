"""The networks of the TBN paper, what of them is counted, and the data they are trained on."""
