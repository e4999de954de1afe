"""The stream: order, loader, views, masks."""
