"""How numbers lose bits: quantizers, and the layers and attention that train through them."""
