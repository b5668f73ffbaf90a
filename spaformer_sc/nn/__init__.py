"""Tensors in, tensors out: attention, encoder, decoders, likelihoods and corruption."""
