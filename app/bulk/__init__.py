"""`python -m app.bulk IN OUT`: the answers to an archive of images, as Parquet. Needs the extra `bulk`.

OUT/run.json                          what was asked of which model, and, once known, how much there is and was done
OUT/listing/listing-000000.parquet    every image there is, in order; a row group for each part
OUT/predictions/part-000000.parquet   a row for each image of a part that could be read
OUT/unreadable/part-000000.parquet    a row for each other one: why not

A part is a run of images whose tables follow from run.json and the listing alone, whoever makes them, and whenever: a
local process or an actor of a Ray cluster. Files are whole or not there, and a part's predictions are written last, so
that they say that it is done. That is all there is to going on after a kill.
"""
