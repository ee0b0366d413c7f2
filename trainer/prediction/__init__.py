"""Prediction on images and on splits. Results are pictures, COCO JSON and the CSV of the Open Images Challenge."""
