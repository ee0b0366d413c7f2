"""Open Images as a source: its layout, tables, class hierarchy and mask zips. Mask rows are joined to box rows here."""
