"""In the place of NVIDIA apex, which needs a GPU: its optimizers' interface, with their arithmetic in plain torch."""
