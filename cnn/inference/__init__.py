"""Trained models in use: prediction, evaluation, export.

from cnn.inference import load

predictor = load("checkpoints/best.pth")
prediction = predictor("photo.jpg")
"""

from cnn.inference.predictor import Prediction, Predictor, load
