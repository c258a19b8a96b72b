"""Methods that choose scales, zeros and codes, from the weight or from its inputs too."""
