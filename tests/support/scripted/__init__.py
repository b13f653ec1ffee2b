"""Scripted stand-ins for the parts around the module under test."""
