"""One file a training method; copy one and change it."""
