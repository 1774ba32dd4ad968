"""A finished run in every form that somebody reads."""
