"""Every picture: data in, Figure out."""
