"""The packed model: byte layouts, packed modules, the folder they are stored in, and the transformers plug-in."""
