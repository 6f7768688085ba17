// What metal-cpp's headers name of Apple's IOSurface. Not an Apple header.
#pragma once

typedef struct __IOSurface* IOSurfaceRef;
