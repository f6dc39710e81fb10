"""Setup of auxiliary losses: their options, checks, objective and image encoder."""
