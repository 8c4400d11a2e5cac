"""One file per inference library; each is imported only when a bundle asks for it."""
