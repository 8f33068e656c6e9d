"""Decoding a test set and scoring it: ROUGE, BLEU, their intervals and settings."""
