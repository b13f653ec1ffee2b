"""A plain Python partner for the pager: framing, a source of pages, and rigs for either side."""
