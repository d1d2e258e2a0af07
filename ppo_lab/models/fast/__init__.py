"""The fast roads: the same functions as the plain ones, proved equal before they are taken."""
