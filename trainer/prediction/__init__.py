"""Prediction on images and on splits of a dataset.

Results are written as pictures, COCO JSON and the CSV of the Open Images Challenge.
"""
