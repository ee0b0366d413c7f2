"""Pictures of annotated images: masks, boxes and names drawn onto a photograph. Pillow and numpy only."""
