"""Does the port compute what the reference computes?"""
