"""Fakes and tiny models for tests, ours and those of whoever builds on Octavo.

Import what you need from the modules: some bring torch, and some must not.
"""
