"""Modules that several experiments share; they import no experiment."""
