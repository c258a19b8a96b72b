"""Methods that choose scales, zeros and codes, from the weight or from its inputs too."""

#: All methods; those from "gptq" on look at the inputs.
METHODS = ("rtn", "mse", "hqq", "gptq", "awq", "gptq+awq")
