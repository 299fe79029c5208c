"""Images of the hospital's own: written here, and read beyond intake."""
