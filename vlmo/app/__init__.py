"""A page to try models and to look at data: `vlmo app`. What it shows is made by functions that know no page."""
