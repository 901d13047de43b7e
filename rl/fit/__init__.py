"""Memory and time prediction: does a recipe fit on this machine?"""
