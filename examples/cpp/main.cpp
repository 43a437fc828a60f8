// Runs a package of torch._inductor.aoti_compile_and_package on images of 8 x 8 floats, without Python.
//
//     run PACKAGE.pt2 IMAGES.bin COUNT      prints the class of each image
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

// Of the kernels' library: lets PyTorch know the operators of packed layers. Called once, before a package is loaded.
extern "C" int tbn_define_operators(void);

int main(int argc, char **argv) try {
    if (argc != 4) {
        std::cerr << "usage: run PACKAGE.pt2 IMAGES.bin COUNT\n";
        return 2;
    }
    if (int failed = tbn_define_operators()) {
        std::cerr << (failed == 1 ? "this libtorch lacks functions that the kernels need\n"
                                  : "libtorch does not take the kernels\n");
        return 1;
    }
    const std::int64_t count = std::atoll(argv[3]);
    torch::Tensor images = torch::empty({count, 1, 8, 8});
    std::ifstream file(argv[2], std::ios::binary);
    if (!file.read(reinterpret_cast<char *>(images.data_ptr<float>()),
                   static_cast<std::streamsize>(images.nbytes()))) {
        std::cerr << argv[2] << " holds fewer than " << count << " images\n";
        return 1;
    }
    torch::inductor::AOTIModelPackageLoader network(argv[1]);
    std::vector<torch::Tensor> results = network.run({images});
    torch::Tensor classes = results.at(0).argmax(1);
    for (std::int64_t i = 0; i < count; i++) std::cout << classes[i].item<std::int64_t>() << "\n";
} catch (const std::exception &error) {
    std::cerr << error.what() << "\n";
    return 1;
}
