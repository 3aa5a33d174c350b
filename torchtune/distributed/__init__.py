"""Process group, ranks and collectives."""
