"""Drafts as files that serving engines load."""
