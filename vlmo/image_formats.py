"""Formats of encoded images that are read; apart, so that the converters' processes need not load torch."""

# None whose reading starts another program, as EPS does.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
