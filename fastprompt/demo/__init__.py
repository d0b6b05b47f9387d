"""The embedded default of fastprompt: a small frozen model and real data, with no download."""
