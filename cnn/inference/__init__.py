"""TrainedModel models in use: predicting, evaluating, exporting.

from cnn.inference import load

predict = load("checkpoints/best.pth")
"""

from cnn.inference.predictor import Prediction, Predictor, load
