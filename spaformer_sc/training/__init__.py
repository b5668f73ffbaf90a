"""The fit: sequences of cells, the loss loop, early stopping, prediction over fields of view."""
