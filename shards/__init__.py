"""The data format and the stream: images, tars, views, order, batches. Knows no model; no torch but in stream."""
