"""From a hospital's raw export to a prepared store: read, validate, de-identify, one item per patient."""
