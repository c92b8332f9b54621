"""The journey and its run folder: which stage runs when, on what, and what it leaves. Begin with journey.py."""
