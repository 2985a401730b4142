"""Checks of models and clusters before training: do gradients equal those of each document run alone?"""
