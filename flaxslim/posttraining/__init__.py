"""Channels die without training: calibration, scores, compensation, budgets."""

from flaxslim.posttraining._data import CalibrationData as CalibrationData
from flaxslim.posttraining._data import read_calibration as read_calibration
