"""Bytes to arrays and back: the stream, PNG, and the files that other people keep images in.

Everything here speaks numpy, so that commands which only move bytes start without torch. Nothing here knows a
command line, a terminal or a model.
"""
