"""The sentence benchmark: a real pretrained sentence encoder and four real domains of text."""
