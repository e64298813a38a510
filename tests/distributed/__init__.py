"""Tests on two processes."""
