"""Classifiers of timm as teachers. Importing this imports no timm."""
