"""Who gets which mail: what may be given, at which prices of limits, and who is withheld or drawn."""
