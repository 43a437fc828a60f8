"""The networks of the TBN paper, what of them is counted, the data and recipes they are trained with, and peers."""
