"""How scales, zeros and codes are chosen: from the weight alone, or from its inputs too."""
